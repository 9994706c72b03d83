"""`memserve top`: a full-screen view of a running server, which it only knows by HTTP.

client.py ──► snapshot.py ──► rates.py ──► figures.py, workers.py, requests.py ──► view.py
asks, bounded   what was told  since the one before    rows and lines, pure          fitted to a screen
"""
