-- Ports of loopback for programs that are told where to listen.
local net = require "moonrabbit.net"

local ports = {}

-- Below those of scripts/broker, and those that the kernel gives to outgoing connections: none of these is taken by
-- chance between the look and the listening.
local LOWEST, COUNT = 12000, 8000
local at

--- One that nothing listens on.
function ports.free()
  at = at or (net.pid() * 7919 + math.floor(net.now() * 1e6)) % COUNT -- each process begins elsewhere
  for _ = 1, COUNT do
    at = (at + 1) % COUNT
    local probe = net.listen("127.0.0.1", LOWEST + at)
    if probe then
      probe:close()
      return LOWEST + at
    end
  end
  error("no port is free", 2)
end

return ports
