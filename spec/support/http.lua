-- Asks a small HTTP server, while the event loop runs.
local native = require "moonrabbit.runtime.native"

local http = {}

--- GET: status and body; nil when nobody answers. `where`: a port of loopback, an address { host, port }, or the path of a
--- unix socket.
function http.get(where, path)
  local endpoint = where
  if type(where) == "number" then endpoint = { host = "127.0.0.1", port = where } end
  if type(where) == "string" then endpoint = { path = where } end
  local stream = native.open(endpoint, nil, 5)
  if not stream then return nil end
  stream:write("GET " .. path .. " HTTP/1.1\r\nHost: x\r\n\r\n", 5)
  local all = {}
  repeat
    local bytes = stream:read(65536, 10)
    all[#all + 1] = bytes
  until not bytes
  stream:close()
  local status, body = table.concat(all):match "^HTTP/1.1 (%d+).-\r\n\r\n(.*)$"
  return tonumber(status), body
end

--- The value of a sample on a page of metrics, 0 when it is not there.
function http.sample(page, name)
  local from, to = ("\n" .. page):find("\n" .. name .. " ", 1, true)
  return from and tonumber(page:sub(to):match "^%S+") or 0
end

return http
