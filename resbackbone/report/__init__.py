"""What a run shows afterwards: report.html, one page that loads nothing."""
