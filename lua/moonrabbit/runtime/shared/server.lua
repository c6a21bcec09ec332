--- Listening sockets. Made for whatever waits for descriptors, and its transports.

local net = require "moonrabbit.net"

local M = {}

--- The function `listen` of a runtime.
function M.of(descriptors, new_transport)
  local watch, wait, release = descriptors.watch, descriptors.wait, descriptors.release

  ---@class moonrabbit.runtime.Server
  local Server = {}
  Server.__index = Server

  --- Waits for a client.
  ---@return moonrabbit.runtime.Transport|nil, string? kind, string? text
  function Server:accept()
    local socket = self.socket
    while socket do
      local stream, why, text = socket:accept()
      if stream then
        local client
        client, text = watch(stream:fd())
        if client then return new_transport(stream, client) end
        stream:close()
        return nil, "refused", text
      end
      if why ~= "again" then return nil, why, text end
      wait(self.watch, "r")
      socket = self.socket
    end
    return nil, "closed", "closed"
  end

  --- The port, also where 0 was asked for.
  ---@return integer
  function Server:port() return self.socket and self.socket:port() or 0 end

  --- Idempotent; a pending accept ends with nil, "closed".
  function Server:close()
    local socket = self.socket
    if not socket then return end
    self.socket = nil
    release(self.watch, socket)
  end

  --- Listens on an address of this machine, or on a unix socket (no port).
  ---@param host string
  ---@param port integer?
  ---@return moonrabbit.runtime.Server|nil, string? text
  return function(host, port)
    local socket, text = net.listen(host, port)
    if not socket then return nil, text end
    local watched
    watched, text = watch(socket:fd())
    if not watched then
      socket:close()
      return nil, text
    end
    return setmetatable({ socket = socket, watch = watched }, Server)
  end
end

return M
