"""Tables, plots and pages, made from recorded results alone."""
