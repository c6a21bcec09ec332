-- A real Redis on a free port of loopback, or on a unix socket, for as long as a spec file runs.
local ports = require "support.ports"
local process = require "support.process"

local Server = {}
Server.__index = Server

local function words(self)
  local list = { "redis-server", "--port", tostring(self.port), "--bind", "127.0.0.1", "--save", "",
    "--appendonly", "no", "--dir", "/tmp", "--unixsocket", self.path, "--unixsocketperm", "700" }
  if self.password then
    list[#list + 1] = "--requirepass"
    list[#list + 1] = self.password
  end
  return list
end

function Server:start()
  self.process = process.start(words(self), { raw = true })
  assert(self.process:await("Ready to accept connections", 20), self.process:out() .. self.process:err())
end

--- kill -9, and everything forgotten.
function Server:stop()
  if self.process then self.process:stop() end
  self.process = nil
  os.remove(self.path)
end

function Server:url(database)
  return ("redis://%s127.0.0.1:%d/%d"):format(self.password and ":" .. self.password .. "@" or "", self.port,
    database or 0)
end

local M = {}

--- Starts one. options: password.
function M.start(options)
  local self = setmetatable({ port = ports.free(), path = os.tmpname() .. ".sock",
    password = options and options.password }, Server)
  self:start()
  return self
end

return M
