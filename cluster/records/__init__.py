"""Records of a run: metrics, Parquet tables, progress, the HTML report and its charts."""
