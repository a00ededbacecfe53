"""Who may connect and who may call: TLS, bearer tokens, and how much each caller may ask for."""
