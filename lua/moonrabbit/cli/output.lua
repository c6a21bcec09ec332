--- Where the command line writes: results on stdout, everything else on stderr, secrets nowhere.

local json = require "moonrabbit.cli.json"
local secret = require "moonrabbit.secret"

local output = {}

local settings = { json = false, quiet = false }

--- Remembers a secret: it is blotted out of everything that goes to stderr.
output.secret = secret.remember

--- A text without the passwords that are known, or that stand in a URL.
function output.redact(text)
  text = text:gsub("(%w+://[^%s:@/]*):[^%s@/]*@", "%1:***@")
  return secret.blot(text)
end

function output.configure(options)
  settings.json = options.json or false
  settings.quiet = options.quiet or false
end

function output.is_json() return settings.json end
function output.is_quiet() return settings.quiet end

--- Writes to stdout; nil, err when the disk is full or the like.
function output.write(...)
  local ok, err = io.stdout:write(...)
  if not ok then return nil, err end
  return true
end

function output.flush()
  local ok, err = io.stdout:flush()
  if not ok then return nil, err end
  return true
end

--- The result of a command: an object with --json, else a line; nothing when --quiet.
function output.result(object, line)
  if settings.json then
    output.write(json.encode(object), "\n")
  elseif not settings.quiet then
    output.write(line, "\n")
  end
  return output.flush()
end

--- One line on stderr.
function output.complain(text)
  text = output.redact(tostring(text)):gsub("%s*[\r\n]+%s*", " ")
  io.stderr:write("moonrabbit: ", text, "\n")
end

--- A remark that --quiet silences.
function output.note(text)
  if not settings.quiet then output.complain(text) end
end

return output
