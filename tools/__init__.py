"""Commands beside the mains: prepare text, train a tokenizer, measure, study."""
