"""Shows ccrun at work on this machine, with a scripted model when there is no key."""
