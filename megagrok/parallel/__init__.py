"""Who is where: ranks, how they start and meet, and the groups that they form. Imports nothing by itself."""
