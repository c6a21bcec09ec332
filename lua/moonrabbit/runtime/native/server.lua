--- Listening sockets.

local net = require "moonrabbit.net"
local descriptors = require "moonrabbit.runtime.native.descriptors"
local transport = require "moonrabbit.runtime.native.transport"

---@class moonrabbit.native.Server
local Server = {}
Server.__index = Server

--- Waits for a client.
---@return moonrabbit.native.Transport|nil, string? kind, string? text
function Server:accept()
  local socket = self.socket
  while socket do
    local stream, why, text = socket:accept()
    if stream then return transport.new(stream) end
    if why ~= "again" then return nil, why, text end
    descriptors.wait(self.watch, "r")
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
  descriptors.unwatch(self.watch)
  socket:close()
end

local M = {}

--- Listens on an address of this machine, or on a unix socket (no port).
---@param host string
---@param port integer?
---@return moonrabbit.native.Server|nil, string? text
function M.listen(host, port)
  local socket, text = net.listen(host, port)
  if not socket then return nil, text end
  return setmetatable({ socket = socket, watch = descriptors.watch(socket:fd()) }, Server)
end

return M
