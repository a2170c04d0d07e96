"""Who may call, and how they prove it: the authority, the registry of sites and people, the rules of access."""
