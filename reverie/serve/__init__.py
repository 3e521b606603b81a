"""Play inside any agent's dream, or in the real environment, in a browser: `reverie play`."""
