"""How far results are from the plain ones, how good sets of them are, and how sure we can be of either."""
