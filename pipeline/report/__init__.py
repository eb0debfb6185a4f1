"""vlm-batch report: a run as a page that people can look at."""
