"""A conversation becomes text with supervised spans; control tokens; the templates that ship."""
