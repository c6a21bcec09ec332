--- Words of the command line as values: headers, arguments, counts. Converters for argparse.

local json = require "moonrabbit.cli.json"

local values = {}

local function split(text)
  local name, colon, value = text:match "^([^=]-)(:?)=(.*)$"
  if not name or name == "" then return nil, ("'%s' is not name=value or name:=JSON"):format(text) end
  if #name > 255 then return nil, "a header's or argument's name is longer than 255 bytes" end
  return name, value, colon == ":"
end

local function parse_json(name, value)
  local decoded, problem = json.decode(value)
  if decoded == nil then return nil, ("the value of '%s' is no JSON: %s"):format(name, problem) end
  return { name, decoded }
end

--- name=value: a string. name:=JSON: what the JSON says.
function values.header(text)
  local name, value, typed = split(text)
  if not name then return nil, value end
  if typed then return parse_json(name, value) end
  return { name, value }
end

--- The same, but integers and booleans need no colon: the broker wants x-message-ttl as a number.
function values.argument(text)
  local name, value, typed = split(text)
  if not name then return nil, value end
  if typed then return parse_json(name, value) end
  if value:find "^%-?%d+$" and #value < 16 then return { name, tonumber(value) } end
  if value == "true" or value == "false" then return { name, value == "true" } end
  return { name, value }
end

--- A list of { name, value } as a table, or nil when it is empty.
function values.table(pairs_list)
  if not pairs_list or #pairs_list == 0 then return nil end
  local t = {}
  for _, pair in ipairs(pairs_list) do t[pair[1]] = pair[2] end
  return t
end

--- A converter for integers from low to high.
function values.integer(low, high)
  return function(text)
    local n = text:find "^%d+$" and #text < 16 and tonumber(text)
    if not n or n < low or n > high then
      return nil, ("'%s' is no integer from %d to %d"):format(text, low, high)
    end
    return n
  end
end

values.count = values.integer(1, 999999999999)

--- A name or another short string of AMQP.
function values.short(text)
  if #text > 255 then return nil, ("a name, key or property of %d bytes: AMQP allows 255"):format(#text) end
  return text
end

--- "host", "host:port", "[::1]:port": { host, port }, the port nil where there is none.
function values.place(text)
  local host, port = text:match "^%[([%x:%.]+)%]:?(%d*)$"
  if not host then host, port = text:match "^([%w%.%-_]+):?(%d*)$" end
  port = port ~= "" and tonumber(port) or nil
  if not host or port and (port < 1 or port > 65535) then return nil, ("'%s' is no host or host:port"):format(text) end
  return { host = host, port = port }
end

--- Unix seconds, or "now".
function values.timestamp(text)
  if text == "now" then return os.time() end
  return values.integer(0, 99999999999)(text)
end

return values
