--- Connected sockets as docs/internals.md describes them, over the streams of moonrabbit.net.
-- Made for whatever waits for descriptors: { watch, wait, release } as in shared/descriptors.lua.

local now = require("moonrabbit.net").now

local M = {}

--- The constructor of transports: (stream, watch of its descriptor or nil) -> transport.
---@param descriptors table
---@param alone (fun(): number?)? as in native/loop.lua, where a script's main chunk may wait without the loop
function M.of(descriptors, alone)
  local wait, release, watch_fd = descriptors.wait, descriptors.release, descriptors.watch

  ---@class moonrabbit.runtime.Transport
  local Transport = {}
  Transport.__index = Transport

  --- What a plain stream waits for is clear; a TLS stream may have to write in order to read.
  local function wants(self, stream, events) return self.secure and stream:wants() or events end

  --- Waits for bytes and gives them to the engine.
  ---@return integer|nil n, string? kind, string? text
  function Transport:fill(engine)
    local stream = self.stream
    while stream do
      local n, why, text = stream:fill(engine)
      if n then return n end
      if why ~= "again" then return nil, why, text end
      wait(self.watch, wants(self, stream, "r"))
      stream = self.stream
    end
    return nil, "closed", "closed"
  end

  --- The same for a script's main chunk that has nobody else to run: waits in the kernel, and leaves the loop and
  --- the task that reads out of it, which cost more than the system calls of a round trip.
  ---@return integer|nil n, string? kind nil or "again": not here, or not now; let the loop wait
  ---@return string? text
  local function fill_alone(self, engine, deadline)
    local stream = self.stream
    if not stream or self.secure or not self.watch.reader then return nil end
    local latest = alone()
    if not latest then return nil end
    local left = (latest < deadline and latest or deadline) - now()
    if left <= 0 then return nil end
    local n, kind, text = stream:fill_within(engine, left)
    return n, kind, text
  end
  if alone then Transport.fill_alone = fill_alone end

  if descriptors.check_home then
    --- Throws where a wait would not be this loop's; asked before each wait of a session.
    function Transport:check_owner() descriptors.check_home(self.watch) end
  end

  --- Writes everything that the engine has to write.
  ---@return boolean|nil ok, string? kind, string? text
  function Transport:flush(engine)
    local stream = self.stream
    while stream do
      local done, why, text = stream:flush(engine)
      if done then return true end
      if why ~= "again" then return nil, why, text end
      wait(self.watch, wants(self, stream, "w"))
      stream = self.stream
    end
    return nil, "closed", "closed"
  end

  --- Writes what can be written now.
  ---@return boolean|nil ok, string? kind "again": something is left, string? text
  function Transport:try_flush(engine)
    local stream = self.stream
    if not stream then return nil, "closed", "closed" end
    local done, why, text = stream:flush(engine)
    if done then return true end
    return nil, why, text
  end

  --- Some bytes, as soon as there are any. At the end: nil, "closed", "".
  ---@param max integer? bytes
  ---@param timeout number? seconds
  ---@return string|nil bytes, string? kind, string? text
  function Transport:read(max, timeout)
    local stream, deadline = self.stream, timeout and now() + timeout
    while stream do
      local bytes, why, text = stream:read(max)
      if bytes then return bytes end
      if why ~= "again" then return nil, why, text end
      if wait(self.watch, wants(self, stream, "r"), deadline) == false then
        return nil, "timeout", "nothing to read in time"
      end
      stream = self.stream
    end
    return nil, "closed", "closed"
  end

  --- Writes all the bytes.
  ---@param bytes string
  ---@param timeout number? seconds
  ---@return boolean|nil ok, string? kind, string? text
  function Transport:write(bytes, timeout)
    local stream, deadline = self.stream, timeout and now() + timeout
    local from, left = 1, #bytes
    while stream do
      local n, why, text
      if left > 0 then
        n, why, text = stream:write(bytes, from)
        if n then
          from, left = from + n, left - n
        end
      else
        n, why, text = stream:settle()
        if n then return true end
      end
      if not n then
        if why ~= "again" then return nil, why, text end
        if wait(self.watch, wants(self, stream, "w"), deadline) == false then
          return nil, "timeout", "the peer does not read in time"
        end
        stream = self.stream
      end
    end
    return nil, "closed", "closed"
  end

  --- TLS version and cipher for people; nil on a plain connection.
  ---@return string?
  function Transport:tls_info() return self.stream and self.stream:tls_info() end

  --- Idempotent; whoever waits in another call on this transport gets nil, "closed".
  function Transport:close()
    local stream = self.stream
    if not stream then return end
    self.stream = nil
    release(self.watch, stream)
  end

  return function(stream, watch)
    return setmetatable({
      stream = stream,
      watch = watch or watch_fd(stream:fd()),
      secure = stream:tls_info() ~= nil,
    }, Transport)
  end
end

return M
