"""From a method's answer to the list of keys that each query attends."""
