--- Looks at a port from below: addresses, TCP, TLS, and what it answers to an AMQP header. For doctor.
-- It waits with a poller of its own, so it is for a process that does nothing else meanwhile.

local core = require "moonrabbit.core"
local net = require "moonrabbit.net"

local probe = {}

local HEADER = "AMQP\0\0\9\1"

local poller

-- Waits until a descriptor is ready or the deadline has passed.
local function wait(fd, events, deadline)
  poller = poller or net.poller()
  poller:set(fd, events)
  local left = deadline - net.now()
  local ready = left > 0 and poller:wait(left) > 0
  poller:set(fd, "")
  return ready
end

--- The addresses of a host: a list of userdata, or nil, text.
function probe.resolve(host, port, timeout)
  local deadline = net.now() + timeout
  local resolver, err = net.resolve(host, port)
  if not resolver then return nil, tostring(err) end
  local list, kind, text = resolver:result()
  while not list and kind == "again" do
    if not wait(resolver:fd(), "r", deadline) and net.now() >= deadline then
      resolver:close()
      return nil, ("no answer from the resolver within %g s"):format(timeout)
    end
    list, kind, text = resolver:result()
  end
  resolver:close()
  if not list then return nil, text or kind end
  return list
end

--- Connects, with TLS when there is a context: a stream and the seconds it took, or nil, kind, text.
function probe.connect(address, context, server_name, timeout)
  local began = net.now()
  local deadline = began + timeout
  local stream, kind, text = net.connect(address, context, server_name)
  if not stream then return nil, kind, text end
  local ok
  ok, kind, text = stream:handshake()
  while not ok and kind == "again" do
    if not wait(stream:fd(), stream:wants(), deadline) and net.now() >= deadline then
      stream:close()
      return nil, "timeout", ("no answer within %g s"):format(timeout)
    end
    ok, kind, text = stream:handshake()
  end
  if not ok then
    stream:close()
    return nil, kind, text
  end
  return stream, net.now() - began
end

--- Sends bytes and reads until `enough(received)`: what came, and "silent" or "closed" when that ended it.
function probe.ask(stream, bytes, timeout, enough)
  local deadline = net.now() + timeout
  local n, kind = stream:write(bytes)
  while not n and kind == "again" do
    if not wait(stream:fd(), stream:wants(), deadline) then return "", "silent" end
    n, kind = stream:write(bytes)
  end
  local received = ""
  while #received < 65536 do
    local chunk
    chunk, kind = stream:read(65536)
    if chunk then
      received = received .. chunk
      if enough(received) then return received end
    elseif kind ~= "again" then
      return received, "closed"
    elseif not wait(stream:fd(), stream:wants(), deadline) and net.now() >= deadline then
      return received, "silent"
    end
  end
  return received
end

local function u32(s, i)
  local a, b, c, d = s:byte(i, i + 3)
  if not d then return nil end
  return ((a * 256 + b) * 256 + c) * 256 + d
end

-- Connection.Start: what the broker says of itself before anybody has logged in.
local function parse_start(payload)
  if payload:sub(1, 4) ~= "\0\10\0\10" then return nil end
  local length = u32(payload, 7)
  if not length or #payload < 10 + length then return nil end
  local start = {}
  local ok, properties = pcall(core.decode_table, payload:sub(7, 10 + length))
  if not ok or type(properties) ~= "table" then
    ok, properties = pcall(core.decode_table, payload:sub(11, 10 + length))
  end
  if ok and type(properties) == "table" then start.properties = properties end
  local at = 11 + length
  local size = u32(payload, at)
  if size then start.mechanisms = payload:sub(at + 4, at + 3 + size) end
  return start
end

local function whole_frame(received)
  local first = received:byte(1)
  if first ~= 1 then return first ~= nil end
  local size = u32(received, 4)
  return size ~= nil and (size > 65536 or #received >= size + 8)
end

local function begins(s, what) return s:sub(1, #what) == what end

-- Without an answer: does it speak TLS, or HTTP, when spoken to so?
local function second_try(again, timeout)
  local stream = again(true)
  if stream then
    stream:close()
    return "tls"
  end
  stream = again(false)
  if stream then
    local received = probe.ask(stream, "GET / HTTP/1.0\r\n\r\n", timeout, function(s) return #s >= 5 end)
    stream:close()
    if begins(received, "HTTP/") then return "http" end
  end
end

--- What a stream answers to the AMQP header. `again(tls)` opens the port once more, with or without
-- an unverified TLS. Returns "amqp", start; or what is there instead: "http" "tls" "amqp_version"
-- "other" "silent" "closed", and a text.
function probe.protocol(stream, timeout, again)
  local received, ended = probe.ask(stream, HEADER, timeout, whole_frame)
  if received:byte(1) == 1 and not ended then
    local start = parse_start(received:sub(8))
    if start then return "amqp", start end
    return "other", "a frame that is no connection.start"
  end
  if begins(received, "HTTP/") then return "http" end
  if received:byte(1) == 21 and received:byte(2) == 3 then return "tls" end
  if begins(received, "AMQP") and #received >= 8 then
    local id, major, minor, revision = received:byte(5, 8)
    return "amqp_version", ("%d-%d-%d-%d"):format(id, major, minor, revision)
  end
  if #received > 0 then return "other", received:sub(1, 40):gsub("[^\32-\126]", ".") end
  return second_try(again, timeout) or ended
end

--- Whether a port that refused TLS speaks plain AMQP or HTTP: "amqp", "http" or nil.
function probe.plain(again, timeout)
  local stream = again(false)
  if not stream then return nil end
  local kind = probe.protocol(stream, timeout, again)
  stream:close()
  return kind
end

return probe
