"""The sweep over routers and balance: its trainings, what they leave, and the report that is made of it."""
