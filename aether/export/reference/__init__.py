"""The networks of exports, one file a framework, copied into exports as they are: they import nothing of Aether."""
