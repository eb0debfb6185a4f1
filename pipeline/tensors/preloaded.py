"""Imported last by the fork server: what it has imported is there to stay, and no garbage collector looks at it again.

Its workers then share that memory with it instead of copying what a collection touches; and it ends at once, where a
last collection over torch and transformers took a second, for which whoever reads the run's output would wait.
"""

import gc

gc.collect()
gc.freeze()
