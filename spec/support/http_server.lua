-- An HTTP server in this process, for specs of clients: it answers what it is told, sense or nonsense.
local native = require "moonrabbit.runtime.native"

local http_server = {}

-- A request: { method, target, headers, body }; nil when the client hung up.
local function read_request(client)
  local bytes = ""
  while true do
    local head, rest = bytes:match "^(.-\r\n\r\n)(.*)$"
    if head then
      local method, target = head:match "^(%u+) (%S+) HTTP/1%.[01]\r\n"
      local request = { method = method, target = target, headers = {}, body = rest }
      for name, value in head:gmatch "\r\n([^:\r\n]+): ([^\r\n]*)" do request.headers[name:lower()] = value end
      local length = tonumber(request.headers["content-length"] or 0)
      while #request.body < length do
        local more = client:read(65536)
        if not more then return nil end
        request.body = request.body .. more
      end
      return request
    end
    local more = client:read(65536)
    if not more then return nil end
    bytes = bytes .. more
  end
end

--- A response with a body and a length.
function http_server.response(code, body, headers)
  return ("HTTP/1.1 %d Whatever\r\ncontent-length: %d\r\n%s\r\n%s"):format(code, #body, headers or "", body)
end

--- Starts one. `answer(request, client)` gives the bytes to send, or nil: nothing is said and the line stays open.
--- Requests are kept in `requests`; `port`, `uri`, `stop()`.
function http_server.start(answer)
  local server = assert(native.listen("127.0.0.1", 0))
  local self = { port = server:port(), requests = {}, clients = {} }
  self.uri = "http://guest:guest@127.0.0.1:" .. self.port
  native.spawn(function()
    while true do
      local client = server:accept()
      if not client then break end
      self.clients[#self.clients + 1] = client
      native.spawn(function()
        local request = read_request(client)
        if not request then return client:close() end
        self.requests[#self.requests + 1] = request
        local bytes = answer(request, client)
        if bytes then
          client:write(bytes)
          client:close()
        end
      end)
    end
  end)
  function self.stop()
    server:close()
    for _, client in ipairs(self.clients) do client:close() end
  end
  return self
end

return http_server
