-- The documentation as the specs read it: pages, their blocks, and the commands in those of the shell.
local process = require "support.process"

local pages = {}

--- Every page there is: one that is added is read too.
function pages.all()
  local list = {}
  local pipe = assert(io.popen "ls *.md docs/*.md bench/*.md examples/*.md examples/*/*.md 2> /dev/null")
  for path in pipe:lines() do list[#list + 1] = path end
  pipe:close()
  return list
end

--- The blocks of a page: { line, language, code }. Throws where one is not closed, or is written in a way that would
-- hide it from this function: indented, or with other marks.
function pages.blocks(text, page)
  local list, line, open, body = {}, 0, nil, nil
  for each in (text .. "\n"):gmatch "(.-)\n" do
    line = line + 1
    local mark = each:match "^%s*```" or each:match "^%s*~~~"
    if not mark then
      if body then body[#body + 1] = each end
    elseif open and each == "```" then
      open.code = table.concat(body, "\n") .. "\n"
      list[#list + 1], open, body = open, nil, nil
    else
      local language = each:match "^```(%l*)$"
      if open or not language then error(("%s:%d: a block begins with ``` and a language"):format(page, line), 0) end
      open, body = { line = line, language = language }, {}
    end
  end
  if open then error(("%s:%d: this block is not closed"):format(page, open.line), 0) end
  return list
end

--- The blocks of a page that is a file.
function pages.read(page) return pages.blocks(process.slurp(page) or "", page) end

-- The words of a command as the shell sees them, expansions and quotes done.
local function words_of(command)
  local list = {}
  local result = process.run({ "sh", "-c", 'printf "%s\\n" ' .. command }, { raw = true })
  for word in result.out:gmatch "([^\n]*)\n" do list[#list + 1] = word end
  return list
end

--- The commands `moonrabbit …` of a block of the shell, as lists of words without `moonrabbit`.
function pages.commands(code)
  local list = {}
  for line in code:gmatch "[^\n]+" do
    local found = (" " .. line):match "%f[%S]moonrabbit (.*)$"
    if found and not line:find "^%s*#" then
      -- Up to a redirection, a pipe, or an &: none of the commands has them quoted in front of those.
      local command = found:gsub("%s+[<>|&] .*$", ""):gsub("%s+&$", "")
      list[#list + 1] = { line = line, words = words_of(command) }
    end
  end
  return list
end

return pages
