"""The quickstart from several seeds."""
