"""Before a pair: who is told what, and who matches whom."""
