"""What a run leaves on disk: metrics, tables, the report and its charts."""
