-- A name server in this process, over TCP: it answers SRV questions from a table, or with nonsense.
local native = require "moonrabbit.runtime.native"

local dns_server = {}

local char, floor = string.char, math.floor

local function u16(n) return char(floor(n / 256) % 256, n % 256) end

function dns_server.name(text)
  local labels = {}
  for label in text:gmatch "[^.]+" do labels[#labels + 1] = char(#label) .. label end
  return table.concat(labels) .. "\0"
end

--- A message: records are { priority, weight, port, target }, and a record may be a raw string.
function dns_server.message(id, code, question, records)
  local parts = { u16(id), u16(0x8180 + code), u16(1), u16(#records), "\0\0\0\0", question }
  for _, record in ipairs(records) do
    if type(record) == "string" then
      parts[#parts + 1] = record
    else
      local data = u16(record[1]) .. u16(record[2]) .. u16(record[3]) .. dns_server.name(record[4])
      -- The owner is a pointer to the question's name.
      parts[#parts + 1] = u16(0xc00c) .. u16(33) .. u16(1) .. "\0\0\0\60" .. u16(#data) .. data
    end
  end
  return table.concat(parts)
end

local function asked(bytes)
  local labels, at = {}, 13
  while bytes:byte(at) ~= 0 do
    local length = bytes:byte(at)
    labels[#labels + 1] = bytes:sub(at + 1, at + length)
    at = at + length + 1
  end
  return table.concat(labels, "."), bytes:sub(13, at + 4)
end

--- Starts one. `zone[name]`: a list of records, a code (2: SERVFAIL), or a function (id, question) that gives the
--- bytes to send, nil: none. An unknown name is NXDOMAIN. Gives `address`, `asked` (names in order), `zone`, `stop()`.
function dns_server.start(zone)
  local server = assert(native.listen("127.0.0.1", 0))
  local self = { address = "127.0.0.1:" .. server:port(), zone = zone, asked = {}, clients = {} }
  native.spawn(function()
    while true do
      local client = server:accept()
      if not client then break end
      self.clients[#self.clients + 1] = client
      native.spawn(function()
        local bytes = ""
        while #bytes < 2 or #bytes < 2 + bytes:byte(1) * 256 + bytes:byte(2) do
          local more = client:read(4096)
          if not more then return client:close() end
          bytes = bytes .. more
        end
        bytes = bytes:sub(3)
        local id = bytes:byte(1) * 256 + bytes:byte(2)
        local name, question = asked(bytes)
        self.asked[#self.asked + 1] = name
        local entry = self.zone[name]
        local answer
        if type(entry) == "function" then
          answer = entry(id, question)
        else
          answer = dns_server.message(id, entry == nil and 3 or type(entry) == "number" and entry or 0, question,
            type(entry) == "table" and entry or {})
        end
        if answer then
          client:write(u16(#answer))
          client:write(answer)
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

return dns_server
