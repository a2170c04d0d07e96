"""A Flower app that plays rounds on demand; it runs where Flower is installed and imports nothing of ours."""
