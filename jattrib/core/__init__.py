"""Protocols, pytree algebra, meshes, the one pass over data, and what is kept on disk.

* `types`: the few protocols, on one page
* `compiler`: releases of it that are not to be trusted
* `errors`: what came, what was expected, the remedy
* `tree`: dot products, paths, selection and digests of pytrees
* `mesh`: meshes, partition specs, placing and fetching
* `stream`: `fold` (sums) and `map_rows` (rows) over a `Source`
* `sources`: examples in memory, a part of them, a random-access sequence
* `store`: rows and parameters on disk, checked when they are read (`files` and `params` are behind it)
* `workers`: processes of one thread, one a core, that run one program
* `progress`: the bar that every long loop shows
"""
