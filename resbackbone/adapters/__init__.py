"""Where other frameworks meet the backbone, one module each; import the one you use."""
