"""An index's rows for other engines: a file for each, their names in a table in `clip_index.exports.rows`."""
