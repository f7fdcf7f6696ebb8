"""Reports: the histories of runs read back, and told in one HTML page and one Markdown file."""
