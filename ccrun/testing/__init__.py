"""A scripted model, a callback receiver and a local service, for the tests of programs that use ccrun, and for our own."""
