"""What tidy rows say: summaries, findings, figures, and one self-contained page."""
