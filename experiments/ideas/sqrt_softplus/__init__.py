"""The router's score as sqrt(softplus(x)), which DeepSeek-V4 has."""
