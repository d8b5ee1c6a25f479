"""Commands for people: the demo and the checks of a service. They use the HTTP API of ccrun."""
