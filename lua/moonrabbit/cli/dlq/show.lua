--- moonrabbit dlq list, moonrabbit dlq show

local exit = require "moonrabbit.cli.exit"
local json = require "moonrabbit.cli.json"
local messages = require "moonrabbit.cli.messages"
local output = require "moonrabbit.cli.output"
local walk = require "moonrabbit.cli.dlq.walk"

local show = {}

local function when(seconds)
  return seconds and os.date("!%Y-%m-%d %H:%M:%SZ", math.floor(seconds)) or "-"
end

-- A text on one line, without control characters, cut.
local function short(text, most)
  text = tostring(text):gsub("[%c]+", " ")
  if #text <= most then return text end
  local last = most - 1
  while last > 0 and text:byte(last + 1) >= 0x80 and text:byte(last + 1) < 0xC0 do last = last - 1 end
  return text:sub(1, last) .. "…"
end

-- What a dead letter tells, as an object of JSON.
local function summary(n, msg, letter)
  local object = { n = n, message_id = msg.properties.message_id, body_bytes = #msg.body }
  for name, value in pairs(letter) do object[name] = value end
  return object
end

local function line(n, letter)
  local attempts = letter.attempts and letter.attempts .. "×" or ""
  return ("%-4d %s  %-4s %s  %s  %s%s"):format(n, when(letter.time), attempts, letter.queue or "?",
    letter.routing_key or "?", letter.reason or "no reason told",
    letter.error and ": " .. short(letter.error, 100) or "")
end

local function finish(result, err, what, args)
  if not result then return nil, err end
  local flushed, problem = output.flush()
  if not flushed then
    output.complain("stdout cannot be written: " .. tostring(problem))
    return exit.failed
  end
  if result.stopped then return result.stopped end
  if result.matched == 0 then
    output.note(("%s: none of %d dead letters %s"):format(args.queue, result.total, what))
    return exit.failed
  end
  if result.matched >= result.limit and result.seen < result.total then
    output.note(("%d of %d dead letters looked at: --limit for more"):format(result.seen, result.total))
  end
  return exit.ok
end

--- dlq list: a line for each.
function show.list(ch, args)
  local result, err = walk.run(ch, args, function(msg, letter, self)
    if args.json then
      output.write(json.encode(summary(self.seen, msg, letter)), "\n")
    elseif not args.quiet then
      output.write(line(self.seen, letter), "\n")
    end
  end, { workers = 1 })
  return finish(result, err, "matches", args)
end

-- ---- One, in full -----------------------------------------------------------------------------------

local fields = {
  { "reason", "reason" }, { "error", "error" }, { "error_kind", "error kind" }, { "attempts", "attempts" },
  { "queue", "died in" }, { "exchange", "exchange" }, { "routing_key", "routing key" }, { "app", "app" },
  { "replays", "replays" },
}

local function write_field(name, value)
  output.write(("%-14s %s\n"):format(name, tostring(value)))
end

local function write_map(title, map)
  local names = {}
  for name in pairs(map) do names[#names + 1] = name end
  if #names == 0 then return end
  table.sort(names)
  output.write(title, "\n")
  for _, name in ipairs(names) do output.write(("  %s = %s\n"):format(name, json.encode(map[name]))) end
end

local function write_all(msg, letter)
  for _, field in ipairs(fields) do
    local value = letter[field[1]]
    if value ~= nil then write_field(field[2], value) end
  end
  write_field("first failure", when(letter.first_failure))
  write_field("dead since", when(letter.time))
  local properties, headers = {}, {}
  for name, value in pairs(msg.properties) do
    if name ~= "headers" then properties[name] = value end
  end
  for name, value in pairs(msg.headers) do
    if name ~= "moonrabbit-traceback" then headers[name] = value end
  end
  write_map("properties", properties)
  write_map("headers", headers)
  if letter.traceback then output.write("traceback\n  ", (letter.traceback:gsub("\n", "\n  ")), "\n") end
  local body = json.is_utf8(msg.body) and msg.body or "(base64) " .. json.base64(msg.body)
  output.write(("body, %d bytes\n"):format(#msg.body), body, "\n")
end

--- dlq show: the n-th of those that match, in full.
function show.one(ch, args)
  local n = args.n or 1
  local found = false
  local result, err = walk.run(ch, args, function(msg, letter, self)
    if self.matched < n then return end
    found = true
    if args.json then
      local object = messages.object(msg)
      object.dead_letter = summary(self.seen, msg, letter)
      output.write(json.encode(object), "\n")
    else
      write_all(msg, letter)
    end
  end, { workers = 1, limit = n })
  if result and not found then result.matched = 0 end
  return finish(result, err, "is that one", args)
end

return show
