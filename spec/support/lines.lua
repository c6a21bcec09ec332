-- A process of TCP lines to a broker that can be cut and stopped, whatever loop the client is in:
--   lua spec/support/lines.lua HOST PORT
-- prints a port. A connection to it makes a line and is told the line's own port; it then says, one word a line,
--   cut      every connection that goes through is closed
--   freeze   nothing is passed on or read any more, in both directions; thaw: it is again
--   count    how many bytes were passed on, in both directions
-- and is answered "ok", or the number. The line goes when that connection does.
-- For those who cannot listen themselves it may be a peer too, with nobody behind it:
--   alone       what connects from now on is taken, and neither read nor written to
--   six         it listens on ::1 as well; answers the port, 0: it cannot
--   unix PATH   and on a unix socket
--   echo        what will connect gets back what it sends
--   say TEXT    what has connected is told a word
--   arrived     how many have connected
--   later TEXT  a second from now what has connected is told a word
--   ended       answers once what has connected has hung up
local native = require "moonrabbit.runtime.native"

local host, port = arg[1], tonumber(arg[2])

local Line = {}
Line.__index = Line

local function copy(self, from, to)
  while true do
    local bytes = from:read(65536)
    while self.frozen do self.thawed:wait() end
    if not bytes or not to:write(bytes) then break end
    self.passed = self.passed + #bytes
  end
  from:close()
  to:close()
end

local function accept(self, server)
  while true do
    local client = server:accept()
    if not client then break end
    local cuts = self.cuts
    local upstream = not self.is_peer and native.open({ host = host, port = port }, nil, 10)
    if self.cuts ~= cuts then -- just as this one was made
      client:close()
      if upstream then upstream:close() end
    elseif self.is_peer then
      self.ends[#self.ends + 1] = client
      if self.echoing then native.spawn(copy, self, client, client) end
    elseif upstream then
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

local function listen(self, ...)
  local server = native.listen(...)
  if not server then return 0 end
  self.servers[#self.servers + 1] = server
  native.spawn(accept, self, server)
  return server:port()
end

function Line:alone() self.is_peer = true end
function Line:six() return listen(self, "::1", 0) end
function Line:unix(path) return listen(self, path) end
function Line:echo() self.echoing = true end

function Line:say(text)
  while not self.ends[1] do native.sleep(0.001) end
  self.ends[1]:write(text)
end

function Line:later(text)
  native.spawn(function()
    native.sleep(1)
    self:say(text)
  end)
end

function Line:arrived() return #self.ends end

function Line:ended()
  while not self.ends[1] do native.sleep(0.001) end
  while self.ends[1]:read() do end
end

function Line:cut()
  self.cuts = self.cuts + 1
  for _, one in ipairs(self.ends) do one:close() end
  self.ends = {}
  self:thaw()
end

local function line(control)
  local self = setmetatable({
    servers = {}, ends = {}, frozen = false, thawed = native.condition(), passed = 0, cuts = 0, is_peer = false,
    echoing = false,
  }, Line)
  control:write(listen(self, "127.0.0.1", 0) .. "\n")
  while true do
    local bytes = control:read(256)
    if not bytes then break end
    local word, more = bytes:match "^(%a+) ?(%S*)"
    control:write((Line[word](self, more) or "ok") .. "\n")
  end
  for _, server in ipairs(self.servers) do server:close() end
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
