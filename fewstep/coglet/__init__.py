"""coglet, the server inside every Cog container, and what each of Cog's doors needs."""
