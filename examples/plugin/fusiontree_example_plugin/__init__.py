"""Components for FusionTree from outside its repository. Nothing is imported here: each kind brings its own file."""
