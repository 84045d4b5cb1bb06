"""The check that tests make of `latentac.method`: each call has the types and the axes that its signature says.

Axes of one name have one size within a call, and within a record (jaxtyping). The package itself does not check them.
"""

from beartype import BeartypeConf, beartype

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))  # a whole number is a float, as for mypy
