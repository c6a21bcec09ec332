-- A TCP proxy in this process, between a client and a broker: it can fall silent, stop reading, or cut the line.
local native = require "moonrabbit.runtime.native"

local proxy = {}

local Proxy = {}
Proxy.__index = Proxy

local function copy(self, from, to, back)
  while true do
    while self.stuck do native.sleep(0.02) end
    local bytes = from:read(65536)
    if not bytes then break end
    while self.stuck do native.sleep(0.02) end
    local swallowed = self.silent or back and self.swallows and self.swallows(bytes)
    if swallowed then self.swallowed = self.swallowed + 1 end
    if not swallowed and not to:write(bytes) then break end
  end
  while self.stuck or back and self.silent do native.sleep(0.02) end
  from:close()
  to:close()
end

--- Starts one; proxy.port is where it listens: `at`, or a free port. `silent = true` swallows everything, the broker's
--- hanging up too, `stuck = true` reads and closes nothing, so that the sockets before it become full, `swallows(bytes)` is asked of what the
--- broker says. `swallowed` counts what it has swallowed.
function proxy.start(host, port, at)
  local server = assert(native.listen("127.0.0.1", at or 0))
  local self = setmetatable({ server = server, port = server:port(), silent = false, swallowed = 0, cuts = 0,
    lines = {} }, Proxy)
  native.spawn(function()
    while true do
      local client = server:accept()
      if not client then break end
      local cuts = self.cuts
      local upstream = not self.held and native.open({ host = host, port = port }, nil, 5)
      if upstream and self.cuts ~= cuts then -- cut before it was open
        upstream:close()
        client:close()
      elseif upstream then
        self.lines[#self.lines + 1] = client
        self.lines[#self.lines + 1] = upstream
        native.spawn(copy, self, client, upstream)
        native.spawn(copy, self, upstream, client, true)
      else
        client:close()
      end
    end
  end)
  return self
end

--- Cuts every connection, those that are just being opened too.
function Proxy:cut()
  self.cuts = self.cuts + 1
  for _, line in ipairs(self.lines) do line:close() end
  self.lines = {}
end

function Proxy:stop()
  self.stuck, self.silent = false, false
  self:cut()
  self.server:close()
end

--- A server that calls fn(transport) for each connection.
function proxy.serve(fn)
  local server = assert(native.listen("127.0.0.1", 0))
  native.spawn(function()
    while true do
      local client = server:accept()
      if not client then break end
      native.spawn(fn, client)
    end
  end)
  return server:port(), function() server:close() end
end

return proxy
