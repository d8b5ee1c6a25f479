"""Callbacks: signing, where one may go, delivery, and the callbacks that are owed."""
