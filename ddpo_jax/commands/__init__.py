"""One file a command, found by its name: flags, help, a call, what is printed. The work lives in other rooms."""
