"""The YAML files of ``mixcn fit --config``: a package, so that they ride in the wheel."""
