"""A scripted model and a callback receiver, for the tests of programs that use ccrun, and for our own."""
