"""Tasks of language models: each a file, requests made from it, and what is reported of their scores."""
