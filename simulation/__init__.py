"""The built-in example: a digits data set, its base model, a split into unequal sites, and a check with stock PEFT."""
