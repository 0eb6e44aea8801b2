"""Reports: typed results of runs as tables, sentences, Markdown and HTML. Numbers come from results.json alone."""
