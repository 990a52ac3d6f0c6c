"""What docs/performance.md shows, drawn and written from results/*.json, so that page and results cannot disagree."""
