-- A process of TCP lines to a broker that can be cut and stopped, whatever loop the client is in:
--   lua spec/support/lines.lua HOST PORT
-- prints a port. A connection to it makes a line and is told the line's own port; it then says, one word a line,
--   cut      every connection that goes through is closed
--   freeze   nothing is passed on or read any more, in both directions; thaw: it is again
--   count    how often something was passed on, in both directions
-- and is answered "ok", or the number. The line goes when that connection does.
local native = require "moonrabbit.runtime.native"

local host, port = arg[1], tonumber(arg[2])

local Line = {}
Line.__index = Line

local function copy(self, from, to)
  while true do
    local bytes = from:read(65536)
    while self.frozen do self.thawed:wait() end
    if not bytes or not to:write(bytes) then break end
    self.passed = self.passed + 1
  end
  from:close()
  to:close()
end

local function accept(self)
  while true do
    local client = self.server:accept()
    if not client then break end
    local upstream = native.open({ host = host, port = port }, nil, 10)
    if upstream then
      self.ends[#self.ends + 1] = client
      self.ends[#self.ends + 1] = upstream
      native.spawn(copy, self, client, upstream)
      native.spawn(copy, self, upstream, client)
    else
      client:close()
    end
  end
end

function Line:freeze() self.frozen = true end

function Line:thaw()
  self.frozen = false
  self.thawed:broadcast()
end

function Line:count() return self.passed end

function Line:cut()
  for _, one in ipairs(self.ends) do one:close() end
  self.ends = {}
  self:thaw()
end

local function line(control)
  local self = setmetatable({
    server = assert(native.listen("127.0.0.1", 0)), ends = {}, frozen = false, thawed = native.condition(), passed = 0,
  }, Line)
  native.spawn(accept, self)
  control:write(self.server:port() .. "\n")
  while true do
    local word = control:read(64)
    if not word then break end
    control:write((Line[word:match "%a+"](self) or "ok") .. "\n")
  end
  self.server:close()
  self:cut()
  control:close()
end

native.run(function()
  local server = assert(native.listen("127.0.0.1", 0))
  io.stdout:write(server:port(), "\n")
  io.stdout:flush()
  while true do
    local control = server:accept()
    if control then native.spawn(line, control) end
  end
end)
